"""What a recipe costs, how its steps are scheduled, and how long they would take."""
