"""How each linear op runs in torch, one op a file."""
