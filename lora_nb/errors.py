"""The one exception that users see as a sentence instead of a trace."""


class UserError(Exception):
    """Something the user can mend: the message names the file or setting, and the cure."""

    def _render_traceback_(self):
        """IPython shows this instead of a trace."""
        return [f"{type(self).__name__}: {self}"]
