"""The ground that every other package stands on: files, names, numbers and processes, nothing about images."""
