"""The service's edge: converts, calls and converts back."""
