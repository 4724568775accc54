"""What a run is: the YAML file a user edits, and the frozen, validated classes that read it."""
