"""Where work runs, how jobs are driven, and the two jobs: cutting a slide into tiles, and scoring them."""
