"""Every option once: its name, type, default, choices and help. What names an option in a message is in `spelling`."""
