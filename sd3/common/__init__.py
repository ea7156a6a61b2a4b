"""Python shared by the launchers, reports, inference and evaluation."""
