"""HunyuanImage-2.1: the transformer and its sizes; the family itself is still to come."""
