"""Every error that a user can cause. The library raises them; the command line prints the message as one line.

A message says what is wrong, where, the value and the limit, and the way out.
"""


def printable(text: str) -> str:
    """One line that does nothing to a terminal: characters that are not printable are escaped, as in \\x1b."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class PtqtpError(Exception):
    """Base of all errors of this package; its text is meant for the user.

    The text is one line that can be printed, whatever was put into it: names out of damaged files hold line breaks and
    control characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the text says what was kept."""


class InputError(PtqtpError):
    """A file given to us is missing, damaged, hostile or of a kind that we do not read."""


class CheckpointError(InputError):
    """A Hugging Face checkpoint folder is incomplete, damaged or of an unsupported architecture."""


class QuantizeError(PtqtpError):
    """Values that cannot be quantized, or arguments that a quantizer does not take."""


class OutOfReach(QuantizeError):
    """Weights too large for a type; another holds them."""


class MomentsError(QuantizeError):
    """Second moments that say nothing of a matrix: not finite, all zero, or singular."""


class TuneError(QuantizeError):
    """Tuning cannot begin or continue: planes that do not fit the model, text, memory, values that are not finite."""


class RecipeError(PtqtpError):
    """A recipe or tensor type that cannot be applied."""


class ServerError(PtqtpError):
    """A server that cannot start, may not be reached, or has died."""


class ChatError(PtqtpError):
    """A message that does not fit the context, a template that refuses it, a saved conversation that is none."""


class CalibrationError(PtqtpError):
    """Calibration text, statistics, or a model that cannot be calibrated."""


class BenchError(PtqtpError):
    """A measurement of speed that cannot be made: its arguments, memory, or a tool that fails."""


class OutputError(PtqtpError):
    """The output cannot be written: path, rights, space, or a failed verification."""


class ResumeError(OutputError):
    """An unfinished conversion exists beside the target, and it was begun in another way."""


class RankError(OutputError):
    """Another rank of a conversion on several processes has failed, or is gone."""


class RuntimeMissing(PtqtpError):
    """The patched runtime, one of its tools or its converter is not installed."""
