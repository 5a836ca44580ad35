"""The operations: values, gradients, rules of their arguments."""
