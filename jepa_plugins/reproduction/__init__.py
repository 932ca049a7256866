"""The papers' tables as runs of this project: what each row takes, what it gave, and how far it is from the paper."""
