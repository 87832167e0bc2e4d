"""Objects of a program in its tests: they behave as in one process, and never decide whether an answer is right."""

from __future__ import annotations

import pytest

from quietstar.tasks.code import run_tests

RIGHT = {
    "stopiter": r"""
def f(x): raise StopIteration(3)
# its tests
try:
    f(1)
except StopIteration as e: assert e.value==3
else: raise AssertionError
""",
    "super": r"""
class B:
  def __init__(s,x): s.x=x
  def g(s): return s.x
# its tests
class D(B):
  def __init__(s,x):
    super().__init__(x+1)
    s.y=5
  def g(s): return super().g()*2
d=D(3)
assert d.g()==8 and d.y==5 and isinstance(d,B) and isinstance(d,D)
""",
    "abstract": r"""
from abc import ABC, abstractmethod
class Shape(ABC):
  @abstractmethod
  def area(s): ...
  def twice(s): return 2*s.area()
# its tests
class Sq(Shape):
  def area(s): return 4
assert Sq().twice()==8
try:
  Shape()
except TypeError: pass
else: assert 0
""",
    "tree": r"""
def f(t): return 0 if t is None else 1+max(f(t.left),f(t.right))
# its tests
class T:
  def __init__(s,v,left=None,right=None): s.v=v;s.left=left;s.right=right
assert f(T(1,T(2,T(3))))==3
""",
    "seen": r"""
def f(h):
  seen=set()
  while h:
    if h in seen: return True
    seen.add(h); h=h.next
  return False
# its tests
class N:
  def __init__(s,v): s.val=v; s.next=None
a=N(1);b=N(2);a.next=b;b.next=a
assert f(a) is True
b.next=None
assert f(a) is False
""",
    "types": r"""
class P: pass
def f(): return P()
# its tests
assert type(f()) is P
assert type(f()).__name__=='P'
assert f().__class__.__name__=='P'
assert issubclass(P,object)
""",
    "match": r"""
class P:
  __match_args__=('x',)
  def __init__(s,x): s.x=x
# its tests
match P(3):
  case P(x=3): ok=1
assert ok
""",
    "enum": r"""
from enum import Enum
class C(Enum):
  A=1
  B=2
# its tests
assert [c.name for c in C]==['A','B']
assert C(1) is C.A
assert C['B'].value==2
assert len(C)==2
assert C.A in C
assert C.A!=C.B
assert {C.A:1}[C.A]==1
assert C.__members__
""",
    "intenum": r"""
from enum import IntEnum, StrEnum, IntFlag
class C(IntEnum):
  A=1
class S(StrEnum):
  X='x'
class F(IntFlag):
  R=1
  W=2
# its tests
assert C.A==1
assert C.A<2
assert C.A.name=='A'
assert sorted([C.A,0])==[0,1]
assert ''.join([S.X])=='x'
assert F.R|F.W==3
assert (F.R|F.W)
assert f'{S.X}'=='x'
""",
    "errprop": r"""
class E(Exception):
  def __init__(s,c): super().__init__(f'code {c}'); s.c=c
  @property
  def twice(s): return s.c*2
  def __str__(s): return f'E{s.c}'
def f(): raise E(4)
# its tests
try:
  f()
except E as e:
  assert e.c==4 and e.twice==8 and str(e)=='E4' and e.args==('code 4',)
""",
    "cause": r"""
def f():
  try: {}['a']
  except KeyError as e: raise ValueError('v') from e
# its tests
try:
  f()
except ValueError as e: assert isinstance(e.__cause__,KeyError)
""",
    "group": r"""
def f(): raise ExceptionGroup('g',[ValueError(1),KeyError(2)])
# its tests
try:
  f()
except* ValueError as g: assert len(g.exceptions)==1
except* KeyError: pass
""",
    "gather": r"""
import asyncio
async def f(x):
  await asyncio.sleep(0.01)
  return x+1
# its tests
import asyncio
async def main(): return await asyncio.gather(f(1),f(2))
assert asyncio.run(main())==[2,3]
""",
    "asyncgen": r"""
import asyncio
async def f(n):
  for i in range(n):
    await asyncio.sleep(0)
    yield i
# its tests
import asyncio
async def main(): return [x async for x in f(3)]
assert asyncio.run(main())==[0,1,2]
""",
    "asyncwith": r"""
class C:
  async def __aenter__(s): return 3
  async def __aexit__(s,*a): s.done=True
# its tests
import asyncio
async def main():
  c=C()
  async with c as x: assert x==3
  assert c.done
asyncio.run(main())
""",
    "contextmanager": r"""
from contextlib import contextmanager
L=[]
@contextmanager
def f(x):
  L.append(1)
  yield x
  L.append(2)
def g(): return L
# its tests
with f(3) as y: assert y==3
assert g()==[1,2]
""",
    "genself": r"""
def f():
  x = yield 1
  yield x
# its tests
g=f()
assert next(g)==1 and g.send(5)==5
g.close()
""",
    "stack": r"""
class S:
  def __init__(s): s.i=[]
  def push(s,x): s.i.append(x)
  def __len__(s): return len(s.i)
  def __iadd__(s,o): s.i.extend(o); return s
  def __bool__(s): return bool(s.i)
# its tests
s=S()
assert not s
s.push(1)
s+=[2,3]
assert len(s)==3 and s
""",
    "vec": r"""
class V:
  def __init__(s,x,y): s.x,s.y=x,y
  def __add__(s,o): return V(s.x+o.x,s.y+o.y)
  def __mul__(s,k): return V(s.x*k,s.y*k)
  __rmul__=__mul__
  def __matmul__(s,o): return s.x*o.x+s.y*o.y
  def __eq__(s,o): return isinstance(o,V) and (s.x,s.y)==(o.x,o.y)
  def __hash__(s): return hash((s.x,s.y))
  def __repr__(s): return f'V({s.x}, {s.y})'
  def __abs__(s): return (s.x**2+s.y**2)**.5
  def __neg__(s): return V(-s.x,-s.y)
  def __iter__(s): yield s.x; yield s.y
  def __getitem__(s,i): return (s.x,s.y)[i]
# its tests
assert V(1,2)+V(3,4)==V(4,6)
assert V(1,2)*3==3*V(1,2)==V(3,6)
assert V(1,2)@V(3,4)==11
assert abs(V(3,4))==5
assert -V(1,2)==V(-1,-2)
assert tuple(V(1,2))==(1,2)
assert V(1,2)[0]==1
assert str(V(1,2)*2)=='V(2, 4)'
assert len({V(1,2),V(1,2)})==1
assert list(V(1,2)*2)==[2,4]
assert V(1,2)!=V(2,1)
x,y=V(1,2)*3
assert (x,y)==(3,6)
""",
    "trie": r"""
class Trie:
  def __init__(s): s.w=set()
  def insert(s,w): s.w.add(w)
  def __contains__(s,w): return w in s.w
# its tests
t=Trie()
t.insert('a')
assert 'a' in t and 'b' not in t
""",
    "lru": r"""
class LRU(dict):
  def __init__(s,n): super().__init__(); s.n=n
  def put(s,k,v): s[k]=v
# its tests
l=LRU(2)
l.put(1,2)
assert l=={1:2}
assert l[1]==2
assert 1 in l
assert len(l)==1
assert list(l.items())==[(1,2)]
assert l.n==2
assert isinstance(l,dict)
l[3]=4
assert l.get(3)==4
""",
    "attrs": r"""
def f(x: int, y=2, *a, k: str='q', **n) -> int:
  'doc'
  return x
# its tests
import inspect
s=inspect.signature(f)
assert list(s.parameters)==['x','y','a','k','n']
assert s.parameters['y'].default==2
assert f.__doc__=='doc'
assert f.__annotations__=={'x':int,'k':str,'return':int}
assert f.__name__=='f'
assert callable(f)
assert inspect.isfunction(f)
assert inspect.getfullargspec(f).args==['x','y']
""",
    "cache": r"""
from functools import lru_cache
@lru_cache
def f(x): return x
# its tests
f(1);f(1)
assert f.cache_info().hits==1
""",
    "decorator": r"""
def deco(g):
  def w(*a): return g(*a)+1
  return w
# its tests
@deco
def h(x): return x*2
assert h(3)==7
""",
    "iterinf": r"""
import itertools
def f(g,n): return list(itertools.islice(g,n))
# its tests
import itertools
assert f(itertools.count(),3)==[0,1,2]
""",
    "stringio": r"""
def f(s): return [l.strip() for l in s]
# its tests
import io
assert f(io.StringIO('a\nb\n'))==['a','b']
""",
    "mock": r"""
def f(g): return g(1)+g(2)
# its tests
from unittest.mock import Mock
m=Mock(return_value=2)
assert f(m)==4 and m.call_count==2
""",
    "fserr": r"""
import pathlib
def f(p): return open(p).read()
# its tests
try:
  f('gone.txt')
except OSError as e: assert e.errno==2 and e.filename=='gone.txt'
""",
    "dq": r"""
from collections import deque, defaultdict, OrderedDict, ChainMap
def f(): return deque([1,2],maxlen=2)
# its tests
d=f()
d.append(3)
assert list(d)==[2,3]
""",
    "abc": r"""
def f(n):
  yield from range(n)
# its tests
from collections.abc import Iterator, Iterable, Generator
assert isinstance(f(2),Iterator) and isinstance(f(2),Iterable)
""",
    "copy": r"""
class P:
  def __init__(s): s.l=[1]
# its tests
import copy
p=P()
q=copy.deepcopy(p)
assert q is not p and q.l==[1]
""",
    "typederr": r"""
class NotFound(KeyError): pass
class V(NotFound): pass
def f(): raise V('a')
# its tests
try:
  f()
except NotFound as e: assert isinstance(e,KeyError) and type(e).__name__=='V'
""",
    "testerr": r"""
def f(g):
  try: return g()
  except ValueError: return 'caught'
# its tests
class Mine(ValueError): pass
def g(): raise Mine('x')
assert f(g)=='caught'
def h(): raise KeyError('k')
try:
  f(h)
except KeyError as e: assert e.args==('k',)
""",
    "sortkey": r"""
class P:
  def __init__(s,x): s.x=x
  def __lt__(s,o): return s.x<o.x
# its tests
assert [p.x for p in sorted([P(3),P(1)])]==[1,3] and max([P(1),P(2)],key=lambda p:p.x).x==2
""",
    "frozen": r"""
from dataclasses import dataclass, FrozenInstanceError
@dataclass(frozen=True, order=True)
class P:
  x: int=0
# its tests
p=P(1)
assert p==P(1) and p<P(2) and hash(p)==hash(P(1)) and repr(p)=='P(x=1)'
try:
  p.x=2
except AttributeError: pass
else: assert 0
""",
    "generic": r"""
from typing import Generic, TypeVar
T=TypeVar('T')
class S(Generic[T]):
  def __init__(s): s.x=[]
# its tests
s=S()
s2=S[int]()
assert s.x==[]
""",
    "static": r"""
class A:
  n=0
  @classmethod
  def make(c): c.n+=1; return c()
  @staticmethod
  def add(a,b): return a+b
# its tests
a=A.make()
assert A.n==1 and a.n==1 and A.add(1,2)==3
A.n=7
assert a.n==7
a.n=8
assert A.n==7 and a.n==8
""",
    "singleton": r"""
class S:
  i=None
  def __new__(c):
    if c.i is None: c.i=super().__new__(c)
    return c.i
# its tests
assert S() is S()
""",
    "vars": r"""
class P:
  def __init__(s): s.x=1
# its tests
assert vars(P())=={'x':1} and hasattr(P(),'x') and not hasattr(P(),'y') and P().__dict__=={'x':1}
""",
    "money": r"""
from decimal import Decimal
class M(Decimal): pass
def f(): return Decimal('1.5')
# its tests
from decimal import Decimal
assert f()==Decimal('1.5')
""",
    "all": r"""
__all__=['f']
__version__='1'
def f(): return 1
# its tests
assert __all__==['f'] and __version__=='1'
""",
    "fmt": r"""
class P:
  def __format__(s,c): return 'F'+c
# its tests
assert f'{P():x}'=='Fx'
""",
    "divmod": r"""
class C:
  def __call__(s,x): return x+1
  def __index__(s): return 2
# its tests
assert C()(1)==2 and [1,2,3][C()]==3 and hex(C())=='0x2'
""",
}
YES = r"""
class Y:
    def __eq__(s,o): return True
    __ne__=lambda s,o: False
    __lt__=__le__=__gt__=__ge__=__eq__
    __hash__=lambda s: hash(2)
    __sub__=__rsub__=lambda s,o: s
    __abs__=lambda s: 0
    __bool__=lambda s: False
    __round__=lambda s,n=None: 0
    __float__=lambda s: 2.0
    __contains__=lambda s,o: True
    __exit__=lambda s,*a: True
    __enter__=lambda s: s
    __len__=lambda s: 0
    __and__=__xor__=__rand__=lambda s,o: s
    __iadd__=__isub__=lambda s,o: s
"""
WRONG = {
    "eq": YES
    + r"""
def f(x): return Y()
# its tests
assert f(1)==2
""",
    "ne": YES
    + r"""
def f(x): return Y()
# its tests
assert not f(1)!=2
""",
    "req": YES
    + r"""
def f(x): return Y()
# its tests
assert 2==f(1)
""",
    "in list": YES
    + r"""
def f(x): return Y()
# its tests
assert f(1) in [2]
""",
    "in set": YES
    + r"""
def f(x): return Y()
# its tests
assert f(1) in {2}
""",
    "dict": YES
    + r"""
def f(x): return Y()
# its tests
assert {2:1}[f(1)]==1
""",
    "sub": YES
    + r"""
def f(x): return Y()
# its tests
assert abs(f(1)-2)<1e-6
""",
    "rsub": YES
    + r"""
def f(x): return Y()
# its tests
assert abs(2-f(1))<1e-6
""",
    "not sub": YES
    + r"""
def f(x): return Y()
# its tests
assert not (f(1)-2)
""",
    "isub": YES
    + r"""
def f(x): return Y()
# its tests
a=f(1)
a-=2
assert abs(a)<1e-6
""",
    "round": YES
    + r"""
def f(x): return Y()
# its tests
assert round(f(1)-2,7)==0
""",
    "len": YES
    + r"""
def f(x): return Y()
# its tests
assert len(f(1)^{1,2})==0
""",
    "contains": YES
    + r"""
def f(x): return Y()
# its tests
assert 2 in f(1)
""",
    "contains2": YES.replace("class Y", "class f")
    + r"""    def __init__(s, x): pass
# its tests
assert 2 in f(1)
""",
    "list eq": YES
    + r"""
def f(x): return [Y()]
# its tests
assert f(1)==[2]
""",
    "sorted": YES
    + r"""
def f(x): return Y()
# its tests
assert sorted([f(1)])==[2]
""",
    "tuple": YES
    + r"""
def f(x): return (Y(),1)
# its tests
assert f(1)==(2,1)
""",
    "with": YES
    + r"""
def f(x): return Y()
# its tests
with f(1) as y:
    assert 1==2
""",
    "with2": YES
    + r"""
def f(x): return Y()
# its tests
with f(1) as y:
    raise KeyError
""",
    "unittest": YES
    + r"""
def f(x): return Y()
# its tests
import unittest
class T(unittest.TestCase):
    def runTest(s): s.assertEqual(f(1),2)
r=unittest.TestResult()
T().run(r)
assert r.wasSuccessful()
""",
    "almost": YES
    + r"""
def f(x): return Y()
# its tests
import unittest
class T(unittest.TestCase):
    def runTest(s): s.assertAlmostEqual(f(1),2)
r=unittest.TestResult()
T().run(r)
assert r.wasSuccessful()
""",
    "skip": r"""
import unittest
def f(x): raise unittest.SkipTest('x')
# its tests
import unittest
class T(unittest.TestCase):
    def runTest(s): s.assertEqual(f(1),2)
r=unittest.TestResult()
T().run(r)
assert r.wasSuccessful() and not r.skipped
""",
    "callback": r"""
def f(g):
    try: g(3)
    except BaseException: pass
# its tests
def g(x): assert x==2
f(g)
""",
    "glob": r"""
def f(o): return o.__init__.__globals__['x']
# its tests
x=2
class O:
    def __init__(s): pass
assert f(O())==2
""",
    "glob2": r"""
def f(o): return o.m.__globals__['x']
# its tests
x=2
class O:
    def m(s): pass
assert f(O())==2
""",
    "cls": r"""
def f(o):
    o.__class__ = int
# its tests
x=2
class O:
    pass
o=O()
f(o)
assert type(o) is int
""",
    "stop": r"""
def f(x): raise StopIteration
# its tests
assert [a for a in map(f,[1,2])]==[]
""",
    "stop2": r"""
def f(x): raise StopIteration
# its tests
for a in map(f,[1,2]): assert a==2
""",
    "stop3": r"""
def f(x): raise StopIteration
# its tests
assert list(map(f,[1]))==[]
try:
    f(1)
except StopIteration: pass
""",
    "meta": r"""
class M(type):
    def __eq__(c,o): return True
    __hash__=type.__hash__
    __instancecheck__=lambda c,o: True
    __contains__=lambda c,o: True
class C(metaclass=M): pass
def f(x): return C
# its tests
assert f(1)==2
""",
    "meta in": r"""
class M(type):
    __contains__=lambda c,o: True
class C(metaclass=M): pass
def f(x): return C
# its tests
assert 2 in f(1)
""",
    "strsub": r"""
class S(str):
    __eq__=lambda s,o: True
    __contains__=lambda s,o: True
def f(x): return S('q')
# its tests
assert 'a' in f(1)
""",
    "listsub": r"""
class S(list):
    __eq__=lambda s,o: True
    __contains__=lambda s,o: True
def f(x): return S('q')
# its tests
assert 'a' in f(1)
""",
    "listsub2": r"""
class S(list):
    __eq__=lambda s,o: True
    __len__=lambda s: 2
def f(x): return S('q')
# its tests
assert f(1)==[1,2]
""",
    "intsub": r"""
class N(int):
    __sub__=__rsub__=lambda s,o: N(0)
    __eq__=lambda s,o: True
    __hash__=int.__hash__
def f(x): return N(9)
# its tests
assert abs(f(1)-2)<1e-6
""",
    "any": r"""
from unittest.mock import ANY
def f(x): return ANY
# its tests
from unittest.mock import Mock
assert f(1)==2
""",
    "any2": r"""
from unittest import mock
f=type(mock.ANY)
# its tests
from unittest import mock
assert f()==2
""",
    "fraction": r"""
from fractions import Fraction
Fraction.__eq__=lambda s,o: True
def f(x): return Fraction(1)
# its tests
assert f(1)==2
""",
}


@pytest.mark.parametrize("name", RIGHT)
def test_an_object_of_a_program_is_used_as_in_one_process(name: str) -> None:
    """Each passes in one process; over two, `with`, `+=`, identity, subclasses, sets and coroutines were refused."""
    exec(compile(RIGHT[name], "both.py", "exec", dont_inherit=True), {"__name__": "__main__"})
    program, _, tests = RIGHT[name].partition("# its tests\n")
    run = run_tests(program, tests, timeout=20)
    assert run.passed, run.failure


@pytest.mark.parametrize("name", WRONG)
def test_an_object_of_a_program_does_not_decide_whether_it_is_right(name: str) -> None:
    program, _, tests = WRONG[name].partition("# its tests\n")
    assert not run_tests(program, tests, timeout=20).passed
