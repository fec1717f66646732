"""How tokens leave without anything breaking: once, for all methods and families."""
