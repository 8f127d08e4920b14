"""Parameter groups, optimisers and learning-rate schedules."""
