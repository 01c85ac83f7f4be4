"""What is wrong with weights and what lies beside them."""


class WeightsError(ValueError):
    """A file of weights or its configuration that is damaged, unsafe or not supported."""
