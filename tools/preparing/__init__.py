"""What tools/prepare_data.py does, a module for each of its commands."""


class DataError(Exception):
    """What is wrong with the request or the folder, and the remedy, in one sentence."""
