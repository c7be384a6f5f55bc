"""A differential fuzz: folders of transformers drawn at random, asked here and there."""
