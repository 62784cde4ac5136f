# placeholder, written by the demo part
