"""Code that the commands share: arguments, messages, the dry run, and the start and end of a process."""
