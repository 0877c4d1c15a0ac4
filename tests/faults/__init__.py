"""Jobs that are killed or interrupted at a random moment and started again, compared with jobs that are not."""
