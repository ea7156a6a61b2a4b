"""What `bash sd3/quickstart.sh` needs beside the launchers and scripts: its prompts and its page."""
