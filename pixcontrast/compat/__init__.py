"""The call signatures of published code, on the operators of this package: change an import, keep the trainer."""
