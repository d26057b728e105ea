"""The command line: the demonstration, facts about the machine, and the benchmark."""
