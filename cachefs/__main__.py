from cachefs.cli import main

main()
