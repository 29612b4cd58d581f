// SPDX-License-Identifier: GPL-2.0-only
/*
 * A direct write to a file of which a page is cached for a private mapping.
 * Prints the byte that the mapping shows afterwards: b, which was written, or
 * a, which was there before.
 */
#include "server.h"

#include <sys/mman.h>
#include <sys/wait.h>

#define BLOCK 4096

static char content[BLOCK];

static void answer_read(struct server *server, struct request *request)
{
	struct fuse_read_in *in = (void *)request->arguments;
	size_t len = in->offset < BLOCK ? BLOCK - in->offset : 0;

	if (len > in->size)
		len = in->size;
	answer(server, request->header.unique, 0, content + BLOCK - len, len);
}

static void serve(struct server *server)
{
	static struct request request;

	for (;;) {
		struct fuse_write_in *in = (void *)request.arguments;

		next_request(server, &request, -1);
		switch (request.header.opcode) {
		case FUSE_READ:
			answer_read(server, &request);
			break;
		case FUSE_WRITE:
			memcpy(content, request.arguments + sizeof(*in), in->size);
			answer_write(server, request.header.unique, in);
			break;
		default:
			answer_other(server, &request);
		}
	}
}

int main(void)
{
	struct server server = {
		.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES,
		.size = BLOCK,
	};
	char data[BLOCK];
	volatile char *mapping;
	pid_t child;
	int fd;

	memset(content, 'a', sizeof(content));
	memset(data, 'b', sizeof(data));
	child = start_server(&server);
	if (!child) {
		serve(&server);
		return 0;
	}
	fd = open(FILE_PATH, O_RDWR);
	if (fd < 0)
		err(1, FILE_PATH);
	mapping = mmap(NULL, BLOCK, PROT_READ, MAP_PRIVATE, fd, 0);
	if (mapping == MAP_FAILED)
		err(1, "mmap");
	if (mapping[0] != 'a')
		errx(1, "the mapping does not show the file");
	if (pwrite(fd, data, BLOCK, 0) != BLOCK)
		err(1, "pwrite");
	printf("%c\n", mapping[0]);
	munmap((void *)mapping, BLOCK);
	close(fd);
	if (umount2(MOUNT_POINT, 0))
		err(1, "umount");
	waitpid(child, NULL, 0);
	return 0;
}
