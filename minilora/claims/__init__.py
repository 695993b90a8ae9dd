"""What is said about LoRA: each sentence with the rows and the rule that decide it, and the verdict."""
