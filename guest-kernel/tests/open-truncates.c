// SPDX-License-Identifier: GPL-2.0-only
/*
 * A write that extends a file is answered while OPEN or CREATE with O_TRUNC of
 * the same file is under way. The server has truncated the file before the
 * write, so it has data. Prints what size the kernel takes the file for when
 * all are done, without asking the server again: 4096, not 0.
 *
 * usage: open-truncates open|create [--extending]
 *
 * With --extending the server sets the flag of our patches, without which the
 * kernel does as ever.
 */
#include "server.h"

#include <sys/wait.h>

#define BLOCK 4096

/* Requests of the race: the open is held until the write was answered. */
static void serve(struct server *server, bool create)
{
	static struct request request;
	uint64_t held = 0;
	uint64_t held_size = 0;

	for (;;) {
		struct fuse_open_in *open_in = (void *)request.arguments;

		next_request(server, &request, -1);
		switch (request.header.opcode) {
		case FUSE_OPEN:
			if (!(open_in->flags & O_TRUNC))
				goto other;
			held = request.header.unique;
			server->size = 0;
			break;
		case FUSE_CREATE:
			held = request.header.unique;
			held_size = server->size = 0;
			break;
		case FUSE_LOOKUP:
			/* The second name is found only by CREATE, as if it was new. */
			answer_lookup(server, &request, !strcmp(request.arguments, "file"));
			break;
		case FUSE_WRITE:
			answer_write(server, request.header.unique, (void *)request.arguments);
			if (!held)
				break;
			/* The writer has its answer before the kernel sees this one. */
			usleep(300000);
			if (create)
				answer_create(server, held, held_size);
			else
				answer_open(server, held);
			held = 0;
			break;
		default:
other:
			answer_other(server, &request);
		}
	}
}

/* Opens in a process of its own, and waits there for the answer. */
static pid_t open_truncating(bool create)
{
	pid_t child = fork();

	if (child < 0)
		err(1, "fork");
	if (!child) {
		int fd = create ? open(MOUNT_POINT "/alias", O_WRONLY | O_CREAT | O_TRUNC, 0600)
				: open(FILE_PATH, O_WRONLY | O_TRUNC);

		if (fd < 0)
			err(1, "open with O_TRUNC");
		_exit(0);
	}
	return child;
}

/* The size that the kernel has, without a question to the server */
static long long cached_size(int fd)
{
	struct statx stat;

	if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_SIZE, &stat))
		err(1, "statx");
	return stat.stx_size;
}

int main(int argc, char **argv)
{
	struct server server = {
		.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES,
	};
	static const char data[BLOCK] = { 1 };
	pid_t child, opener;
	bool create;
	int fd, status;

	if (argc < 2)
		errx(2, "usage: open-truncates open|create [--extending]");
	create = !strcmp(argv[1], "create");
	if (argc > 2 && !strcmp(argv[2], "--extending"))
		server.open_flags |= FOPEN_PARALLEL_EXTENDING_WRITES;
	child = start_server(&server);
	if (!child) {
		serve(&server, create);
		return 0;
	}
	fd = open(FILE_PATH, O_RDWR);
	if (fd < 0)
		err(1, FILE_PATH);
	opener = open_truncating(create);
	/* It has to be under way first. */
	usleep(300000);
	if (pwrite(fd, data, BLOCK, 0) != BLOCK)
		err(1, "pwrite");
	waitpid(opener, &status, 0);
	if (status)
		errx(1, "the opener has failed");
	printf("%lld\n", cached_size(fd));
	close(fd);
	if (umount2(MOUNT_POINT, 0))
		err(1, "umount");
	waitpid(child, NULL, 0);
	return 0;
}
