// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two parallel direct writes of a page that is under writeback. Linux below 6.9
 * crashes: kernel BUG at fs/fuse/dir.c, in fuse_set_nowrite(). Prints "alive"
 * if it does not.
 */
#include "server.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define BLOCK 4096
#define WRITERS 2
/* The page stays under writeback until no request has come for so long. */
#define QUIET 1000

static int direct;

static void *write_directly(void *unused)
{
	static const char data[BLOCK] = { 1 };

	(void)unused;
	if (pwrite(direct, data, BLOCK, 0) != BLOCK)
		err(1, "pwrite");
	return NULL;
}

/* The first opener gets the cache, the second one parallel direct writes. */
static void serve(struct server *server)
{
	static struct request request;
	static const char zeros[BLOCK];
	struct fuse_write_in held = { 0 };
	uint64_t unique = 0;

	for (;;) {
		struct fuse_write_in *in = (void *)request.arguments;

		if (!next_request(server, &request, unique ? QUIET : -1)) {
			answer_write(server, unique, &held);
			unique = 0;
			continue;
		}
		switch (request.header.opcode) {
		case FUSE_OPEN:
			answer_open(server, request.header.unique);
			server->open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
			break;
		case FUSE_READ:
			answer(server, request.header.unique, 0, zeros, BLOCK);
			break;
		case FUSE_WRITE:
			if (in->write_flags & FUSE_WRITE_CACHE && !unique) {
				held = *in;
				unique = request.header.unique;
			} else {
				answer_write(server, request.header.unique, in);
			}
			break;
		default:
			answer_other(server, &request);
		}
	}
}

/* Leaves the only page of the file under writeback. */
static void write_back(int fd)
{
	char *mapping = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (mapping == MAP_FAILED)
		err(1, "mmap");
	mapping[0] = 1;
	if (sync_file_range(fd, 0, BLOCK, SYNC_FILE_RANGE_WRITE))
		err(1, "sync_file_range");
	munmap(mapping, BLOCK);
}

int main(void)
{
	struct server server = { .open_flags = 0, .size = BLOCK };
	pthread_t writers[WRITERS];
	pid_t child;
	int cached, i;

	child = start_server(&server);
	if (!child) {
		serve(&server);
		return 0;
	}
	cached = open(FILE_PATH, O_RDWR);
	direct = open(FILE_PATH, O_RDWR);
	if (cached < 0 || direct < 0)
		err(1, FILE_PATH);
	write_back(cached);
	for (i = 0; i < WRITERS; i++)
		if (pthread_create(&writers[i], NULL, write_directly, NULL))
			errx(1, "pthread_create");
	for (i = 0; i < WRITERS; i++)
		pthread_join(writers[i], NULL);
	printf("alive\n");
	close(direct);
	close(cached);
	if (umount2(MOUNT_POINT, 0))
		err(1, "umount");
	waitpid(child, NULL, 0);
	return 0;
}
