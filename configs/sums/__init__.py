"""Story sums: seeded problems for a small pretrained model, and their exact score."""
