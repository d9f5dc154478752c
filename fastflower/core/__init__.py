"""The foundation of all packages: files, records, checkpoints, seeding, processes and charts; nothing about images."""
