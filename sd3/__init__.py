"""Everything a user runs: launchers, inference, and what they share."""
