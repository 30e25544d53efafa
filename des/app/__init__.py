"""The app: its session and its page."""
