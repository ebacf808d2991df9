"""python -m ptqtp_gguf"""

from .cli import main

main()
