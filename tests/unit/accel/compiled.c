/* Integer code as compilers write it: hashing, sorting, recursion, switch tables, division of every width,
   128-bit arithmetic, overflow checks. Each result goes to the next word of `out`; the last word is their
   number. */
typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned char u8;
typedef long i64;
typedef int i32;
typedef unsigned short u16;
typedef unsigned __int128 u128;
static u32 crc32(const u8 *p, u64 n) {
    u32 c = ~0u;
    for (u64 i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++) c = (c >> 1) ^ (0xEDB88320u & -(c & 1));
    }
    return ~c;
}
static void sort(i32 *a, int n) {
    for (int i = 1; i < n; i++) {
        i32 v = a[i];
        int j = i - 1;
        while (j >= 0 && a[j] > v) {
            a[j + 1] = a[j];
            j--;
        }
        a[j + 1] = v;
    }
}
static u64 fib(int n) {
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}
static const u32 K[8] = {0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5,
                         0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5};
#define R(x, n) (((x) >> (n)) | ((x) << (32 - (n))))
static void sha(u32 *h, const u32 *w) {
    u32 a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], q = h[7];
    for (int i = 0; i < 64; i++) {
        u32 t1 = q + (R(e, 6) ^ R(e, 11) ^ R(e, 25)) + ((e & f) ^ (~e & g)) + K[i & 7] + w[i & 15];
        u32 t2 = (R(a, 2) ^ R(a, 13) ^ R(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        q = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    h[0] += a;
    h[1] += b;
    h[2] += c;
    h[3] += d;
    h[4] += e;
    h[5] += f;
    h[6] += g;
    h[7] += q;
}
static int sw(int x) {
    switch (x) {
    case 0:
        return 3;
    case 1:
        return 17;
    case 2:
        return -4;
    case 3:
        return 99;
    case 4:
        return x * x;
    case 5:
        return 1000;
    case 6:
        return ~x;
    case 7:
        return 5;
    default:
        return -1;
    }
}
static u64 mulmod(u64 a, u64 b, u64 m) {
    return (u64)((u128)a * b >> 3) % m;
}
static int cmp(const u8 *a, const u8 *b) {
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a - *b;
}
static u64 rng(u64 *s) {
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}
__attribute__((section(".text.entry"))) void entry(u64 *out) {
    u64 s = 88172645463325252UL;
    u8 buf[512];
    i32 arr[64];
    int o = 0;
    for (int i = 0; i < 512; i++) buf[i] = rng(&s);
    out[o++] = crc32(buf, 512);
    for (int i = 0; i < 64; i++) arr[i] = (i32)rng(&s);
    sort(arr, 64);
    u64 acc = 0;
    for (int i = 0; i < 64; i++) acc = acc * 31 + (u32)arr[i];
    out[o++] = acc;
    out[o++] = fib(14);
    u32 h[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int i = 0; i < 4; i++) sha(h, (u32 *)(buf + 64 * i));
    for (int i = 0; i < 8; i++) out[o++] = h[i];
    acc = 0;
    for (int i = -2; i < 12; i++) acc = acc * 7 + sw(i);
    out[o++] = acc;
    for (int i = 0; i < 20; i++) {
        u64 a = rng(&s), b = rng(&s), m = rng(&s) | 1;
        out[o] = mulmod(a, b, m);
        out[o] ^= (u64)((i64)a / (i64)(b | 1));
        out[o] += (u64)((i64)a % (i64)(i32)(b | 1));
        out[o] ^= (u32)a / (u32)(b | 1);
        out[o] += (i32)a % (i32)(m >> 40 | 1);
        out[o] -= (u16)a / (u16)(b | 1);
        out[o] ^= (u8)a % (u8)(b | 1);
        out[o] += (signed char)a / (signed char)(b | 1);
        o++;
    }
    u128 big = 1;
    for (int i = 1; i < 40; i++) {
        big = big * (rng(&s) | 1) + i;
        big ^= big >> (i & 63);
        if (big & 4)
            big -= s;
        if ((i64)s < 0)
            big += (u128)s << 64;
    }
    out[o++] = big;
    out[o++] = big >> 64;
    acc = 0;
    for (int i = 0; i < 64; i++) {
        u64 x = rng(&s);
        acc += __builtin_ctzl(x | 1UL << 40) + 63 - __builtin_clzl(x | 1);
        acc = (acc << (x & 63)) | (acc >> ((64 - (x & 63)) & 63));
        acc ^= __builtin_bswap64(x) + __builtin_bswap32((u32)x);
        acc += (i32)x >> (x >> 59);
        acc ^= (u64)((signed char)x);
        if ((u32)x > (u32)(x >> 32))
            acc++;
        if ((i32)x <= (i32)(x >> 32))
            acc ^= x;
        acc += (x & 0x8000) ? (u16)x : (i64)(short)x;
    }
    out[o++] = acc;
    u8 t[80];
    for (int i = 0; i < 79; i++) t[i] = 33 + (rng(&s) % 90);
    t[79] = 0;
    acc = 0;
    for (int i = 0; i < 70; i++) acc = acc * 3 + cmp(t + i, t + (i * 7) % 70);
    out[o++] = acc;
    _Bool p;
    i64 r;
    i32 r2;
    acc = 0;
    for (int i = 0; i < 50; i++) {
        i64 a = rng(&s), b = rng(&s);
        p = __builtin_add_overflow(a, b, &r);
        acc = acc * 3 + p + r;
        p = __builtin_sub_overflow((i32)a, (i32)b, &r2);
        acc = acc * 5 + p + r2;
        p = __builtin_mul_overflow(a >> 20, b >> 30, &r);
        acc = acc * 7 + p + r;
    }
    out[o++] = acc;
    out[63] = o;
}
