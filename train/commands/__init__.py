"""The commands of the launcher, one file each; none imports anything heavy before it runs."""
