// SPDX-License-Identifier: GPL-2.0-only
/*
 * Writes 1 MiB at a time to a file, from a buffer that begins 16 bytes behind
 * the start of a page, as those of malloc(3) do. It has 257 pages; how many
 * requests each write takes is counted by the server.
 */
#include <err.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#define SIZE (1 << 20)

int main(int argc, char **argv)
{
	char *pages = aligned_alloc(4096, SIZE + 4096);
	int file;

	if (argc != 3)
		errx(2, "usage: unaligned-write FILE WRITES");
	file = open(argv[1], O_CREAT | O_WRONLY, 0600);
	if (!pages || file < 0)
		err(1, "%s", argv[1]);
	for (int i = atoi(argv[2]); i > 0; i--)
		if (write(file, pages + 16, SIZE) != SIZE)
			err(1, "write");
	return 0;
}
