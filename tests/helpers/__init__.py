"""What several test modules share: small models, runs of the command line, a hub, damage, what MLX keeps."""
