"""What a person sees: progress, answers, contact sheets."""
