/* Copy memory past the processor's cache.
 *
 * A store that goes through the cache first reads the line that it overwrites: a third of the traffic, for a buffer that
 * nobody reads soon. C libraries have such copies, for sizes that no tensor reaches (glibc: from three quarters of what
 * it takes for the cache, 200 MB on some processors). Plain x86-64; one C function, loaded through ctypes.
 */
#include <emmintrin.h>
#include <stdint.h>
#include <string.h>

#define AHEAD 1024 /* bytes: a tenth faster than without on an EPYC */

void swin_scale_stream(char *target, const char *source, size_t bytes) {
    size_t head = -(uintptr_t)target % 16;
    if (head > bytes) head = bytes;
    memcpy(target, source, head);
    target += head, source += head, bytes -= head;
    size_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
        const __m128i *from = (const __m128i *)(source + i);
        __m128i *to = (__m128i *)(target + i);
        _mm_prefetch(source + i + AHEAD, _MM_HINT_NTA); /* never faults, at the end either */
        __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
        __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
    _mm_sfence(); /* streamed stores are seen by others in no order without it */
    memcpy(target + i, source + i, bytes - i);
}
