"""What the program needs of the machine: files, signals, memory, threads, helper processes."""
