"""Operations: registration, autograd and the public functions, one file per operation."""
