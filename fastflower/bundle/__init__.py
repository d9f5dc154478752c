"""The hand-in: members, exported programs, the folder that `code/predict.py` runs, and the gates it must pass."""
