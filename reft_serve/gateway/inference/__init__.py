"""One inference request from its body to its last byte."""
