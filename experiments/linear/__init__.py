"""What the mains about linear attention share: cases, tasks, pictures."""
