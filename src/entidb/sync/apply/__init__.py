"""What a cycle does to the device's database, one storage commit for each step."""
