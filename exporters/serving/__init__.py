"""What is delivered of a bundle: folders for servers. See README.md beside this file."""
