"""Tests, in folders by layer; their cases stand beside them."""
