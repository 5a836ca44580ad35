"""Operations: registration, autograd and public functions, one file per operation."""
