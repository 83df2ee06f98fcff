"""What a first reader may skip: keys and files, run folders, processes, resume, memory."""
