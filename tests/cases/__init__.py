"""What the tests call the operations with: options, layouts, bad data, random draws."""
