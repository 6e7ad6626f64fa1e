"""A question that is not answered, and why: a code and values, whose words are looked up in each language.

raise Refusal("too_large", 413, megabytes=20)
"""


class Refusal(ValueError):
    """A request that is not answered.

    Args:
        code: of the reason, such as "busy"; `page/words/*.json` have its text in each language.
        status: of HTTP.
        values: that the text names.
    """

    def __init__(self, code: str, status: int = 400, **values: object):
        super().__init__(code)
        self.code, self.status, self.values = code, status, values
