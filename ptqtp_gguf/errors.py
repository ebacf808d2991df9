"""Every error that a user can cause. The library raises them; the command line prints the message as one line.

A message says what is wrong, where, the value and the limit, and the way out.
"""


class PtqtpError(Exception):
    """Base of all errors of this package; its text is meant for the user."""


class InputError(PtqtpError):
    """A file given to us is missing, damaged, hostile or of a kind that we do not read."""


class CheckpointError(InputError):
    """A Hugging Face checkpoint folder is incomplete, damaged or of an unsupported architecture."""


class QuantizeError(PtqtpError):
    """Values that cannot be quantized, or arguments that a quantizer does not take."""


class TuneError(QuantizeError):
    """Tuning cannot begin or go on: planes that do not fit the model, text, memory, values that are not finite."""


class RecipeError(PtqtpError):
    """A recipe or tensor type that cannot be applied."""


class CalibrationError(PtqtpError):
    """Calibration text, statistics, or a model that cannot be calibrated."""


class OutputError(PtqtpError):
    """The output cannot be written: path, rights, space, or a failed verification."""


class ResumeError(OutputError):
    """An unfinished conversion lies beside the target, and it was begun in another way."""


class RuntimeMissing(PtqtpError):
    """The patched runtime, one of its tools or its converter is not installed."""
