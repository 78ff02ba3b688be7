"""What the commands share: arguments, checks, messages, and how a process begins and ends."""
