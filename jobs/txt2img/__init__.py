"""The original script's command, option for option."""
